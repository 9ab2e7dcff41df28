"""Work done elsewhere: in other processes, or on other machines, any of which may die."""
