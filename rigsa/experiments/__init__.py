"""The rig: experiments on Textual MNIST, from a configuration to a report. `rigsa.run` is its command line."""
