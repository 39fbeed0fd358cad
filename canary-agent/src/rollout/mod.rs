//! Gates: what is known of a canary, and what follows from it. Pure.
//!
//! [`evidence`] weighs counts against a ratio, [`gate`] makes a verdict of several
//! signals' evidence, [`sample_ratio`] holds the measured share against the asked one, and
//! [`record`] reads windows that were written down.
//!
//! Windows of counts come in, verdicts go out: must not know where the counts are from, what
//! time it is, nor what is done about a verdict.

pub mod evidence;
pub mod gate;
pub mod record;
pub mod sample_ratio;
