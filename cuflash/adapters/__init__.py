"""What cuflash has for one library of arrays alone; a room is loaded when an array of its library is met."""
