//! Rollouts: what is known of a canary, what follows from it, and what is done next. Pure.
//!
//! [`evidence`] weighs counts against a ratio, [`gate`] makes a verdict of several
//! signals' evidence, [`watch`] one of that and of what others were asked, [`pool`] puts windows
//! together that say too little, [`sample_ratio`] holds the measured share against the asked one,
//! and [`record`] reads windows that were written down. [`drive`] goes through the steps.
//! [`sensitivity`] says what a gate would find before there is anything to find, and [`outlook`]
//! that of all gates of a rollout.
//!
//! What happens comes in, with its time; what is wished for goes out. Must not know where counts
//! and answers are from, nor how a wish is carried out.

pub mod drive;
pub mod evidence;
pub mod gate;
pub mod outlook;
pub mod pool;
pub mod record;
pub mod sample_ratio;
pub mod sensitivity;
pub mod watch;
