//! Networks and what stands under them: a function from client addresses to values, written
//! down as prefixes of which the longest match counts.
//!
//! Owns the compiler from audiences to such prefixes ([`flatten`]), their least number
//! ([`Labelled`]), the order in which one set of them takes the place of another
//! ([`difference`]), and what keeps open connections where they are meanwhile ([`Classes`]). Must not know of routes' names, of the kernel or of clocks.
//!
//! Both families are handled alike: an address is the first bits of a number of 128.

mod change;
mod difference;
mod fewest;
mod flatten;
mod prefix;

pub use change::{Classes, Pace};
pub use difference::{Difference, Write, difference};
pub use fewest::Labelled;
pub use flatten::{combine, flatten, union};
pub use prefix::{Prefix, Width};
