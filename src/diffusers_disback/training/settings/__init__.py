"""Settings: what is true of each, said once where it is declared."""
