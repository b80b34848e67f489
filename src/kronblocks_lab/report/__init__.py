"""The report of finished trainings."""
