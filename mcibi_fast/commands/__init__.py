"""What the commands of ``mcibi-fast`` do, one module each with ``run(args)``."""
