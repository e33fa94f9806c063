"""`python -m wherry_agent`: the same as `wherry-agent`."""

import sys

from wherry_agent.cli import main

sys.exit(main())
