def add_commands(commands, argv):
    pass
