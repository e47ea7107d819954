"""`python -m data.prepare`: raw records into tokenized sources."""
