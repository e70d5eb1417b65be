"""From run folders to tables, figures and a page. Nothing here trains or loads a model."""
