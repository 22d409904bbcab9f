"""`align convert`: a configuration of TRL's command line as one of ours."""
