"""What people look at; drawn from `ProbeResults` alone."""
