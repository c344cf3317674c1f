"""Operations shared by the API, console and command line: explanations, counts, bulk actions, checks."""
