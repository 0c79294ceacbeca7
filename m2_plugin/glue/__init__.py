"""GLUE: the tasks, the sweep over them, its report."""
