"""The command line. Terminal output is only here."""
