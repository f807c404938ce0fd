"""What a person is shown: data, the progress of a search, its result."""
