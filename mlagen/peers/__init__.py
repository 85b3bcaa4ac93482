"""The peers, a file each: what a user would run without mlagen."""
