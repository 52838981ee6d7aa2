"""Preference tuning: the losses of DPO, ORPO, SimPO and KTO on the log-probabilities of whole answers."""
