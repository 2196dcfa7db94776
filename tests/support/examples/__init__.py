"""Extensions of one file each, as a project of its own would write them; tests register and run them."""
