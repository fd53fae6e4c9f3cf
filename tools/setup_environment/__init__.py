"""`make setup`: from a checkout and any Python 3.9+ to a `.venv` with everything that the tests and the demo need.

Run as `python3 -m tools.setup_environment` in the checkout. This folder uses the standard library only, and Python
3.9's syntax, because it runs before anything else is there.

    __main__.py      the order of the steps, and the stamp that lets the next run skip them
    pythons.py       which Pythons this machine has, and whether the current one has torch
    uv.py            uv, the installer: found or fetched, and told where packages come from
    system_torch.py  `.venv` on top of an environment that already has torch (an NVIDIA container)
    common.py        talking to the person watching, running commands
"""
