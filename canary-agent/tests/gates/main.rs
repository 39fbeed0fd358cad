//! Gates from outside: evidence against an independent reckoning, verdicts, recordings, and
//! simulated rollouts.

mod evidence;
mod exact;
mod outlook;
mod replay;
mod rivals;
mod sample_ratio;
mod sensitivity;
mod simulation;
mod sparse;
mod verdict;
