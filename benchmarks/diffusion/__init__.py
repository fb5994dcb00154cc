"""What does text to image learn? A pipeline that is far too small for anything but shapes."""
