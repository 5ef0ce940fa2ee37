"""`distlib doctor`: facts gathered, checked, tried out on real ranks, and shown.

    gather.py, machine.py, gpus.py,
    fabric.py                              the machine and the job   -> facts.py, plain data
    checks.py, check_gpus.py, check_fabric.py,
    check_settings.py, check_job.py        facts                     -> problems, each with its fix
    selftest.py, local_ranks.py,
    nccl_log.py                            ranks that communicate    -> right or wrong, how fast, over what
    show.py                                a report                  -> a terminal

examine.py calls them in this order.
"""
