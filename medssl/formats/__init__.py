"""The kinds of files that scans and labels come in: one module a kind, behind one record."""
