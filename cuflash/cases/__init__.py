"""What is checked, compiled and measured: named problems, their arrays and their calls."""
