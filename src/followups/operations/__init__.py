"""What the API, the console and the command line share: explanations, counts, bulk actions and the doctor's checks."""
