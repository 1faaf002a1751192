"""What cuflash has for one library alone; a room is loaded when an array of its library is met, or by its user."""
