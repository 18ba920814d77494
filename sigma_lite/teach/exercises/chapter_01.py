from sigma_lite.teach.exercises.exercise import Exercise

EXERCISES: tuple[Exercise, ...] = ()
