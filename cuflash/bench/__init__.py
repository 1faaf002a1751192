"""What is run to be checked, compiled or measured: cases, their inputs, the peers and the clock."""
