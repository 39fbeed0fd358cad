//! The way from one set of prefixes to another under traffic.

use super::{fewest::Labelled, prefix::Prefix};

/// One step of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write<T> {
    /// The value stands under the prefix from now on.
    Set(Prefix, T),
    /// The prefix is gone.
    Remove(Prefix),
}

/// What brings one set of prefixes to another, in an order in which no address ever has a value
/// that is neither the one before nor the one after.
///
/// Longer prefixes are set before shorter ones: what a prefix would hide or change too early has
/// its own by then. Shorter ones are removed before longer ones, after all is set: an address that
/// loses its prefix falls to the one that it shall have, and not to one on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference<T> {
    /// The steps.
    pub writes: Vec<Write<T>>,
}

/// What brings the prefixes of `from` to those of `to`.
///
/// The value of addresses under no prefix has to be the same in both.
pub fn difference<T: Copy + Ord>(from: &Labelled<T>, to: &Labelled<T>) -> Difference<T> {
    let (mut old, mut new) = (from.prefixes().iter().peekable(), to.prefixes().iter().peekable());
    let (mut set, mut removed) = (Vec::new(), Vec::new());
    loop {
        match (old.peek().copied(), new.peek().copied()) {
            (None, None) => break,
            (Some((at, _)), Some((other, _))) if at < other => {
                removed.push(*at);
                old.next();
            }
            (Some((at, _)), None) => {
                removed.push(*at);
                old.next();
            }
            (Some((at, before)), Some((other, after))) if at == other => {
                if before != after {
                    set.push((*at, *after));
                }
                old.next();
                new.next();
            }
            (_, Some((other, after))) => {
                set.push((*other, *after));
                new.next();
            }
        }
    }
    set.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
    removed.sort_by_key(|prefix| prefix.len());
    let set = set.into_iter().map(|(prefix, value)| Write::Set(prefix, value));
    Difference { writes: set.chain(removed.into_iter().map(Write::Remove)).collect() }
}
