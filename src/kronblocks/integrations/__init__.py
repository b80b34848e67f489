"""Other frameworks, each imported only where it is used."""
