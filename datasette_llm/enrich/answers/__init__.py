"""What an answer has to be: whole, of the shape that was asked for, and something its columns can hold."""
