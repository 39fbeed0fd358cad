//! The rules of just enough tracking (DESIGN §2), each by itself, through the real planner and
//! the loaded program. A test fails when its rule is taken out.
//!
//! What comes with later releases is held as far as it is there: fragments and ICMP errors
//! (rule 15) pass to the host and change nothing; entries that only carry signals (rule 14)
//! do not exist.

mod keys;
mod planning;
mod steering;
mod support;
mod translated;
