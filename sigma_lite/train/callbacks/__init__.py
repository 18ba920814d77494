"""What happens around the steps; one idea a file."""
