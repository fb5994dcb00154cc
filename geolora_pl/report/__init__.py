"""What people look at: names of what is logged, pictures, and the page about runs."""
