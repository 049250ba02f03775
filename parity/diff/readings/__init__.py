"""What a wrong record shows in place of its point, and whether what is made from it acquits it."""
