"""What changes training beyond a network and an optimizer, one small file each."""
