"""`m2-plugin train-report`: what a run's loggers wrote, as pictures and one page."""
