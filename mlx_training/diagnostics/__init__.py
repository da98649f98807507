"""Why a run does not learn: the doctor's checks, gradient report, step profile, memory and time plan."""
