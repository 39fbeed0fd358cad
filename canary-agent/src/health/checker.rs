//! When a backend goes down and when it comes up again: a state machine over the
//! results of its checks.

/// Whether a backend is up, as its checks have it.
///
/// ```
/// use canary_agent::health::Checker;
///
/// let mut checker = Checker::new(2, 3, true);
/// let results = [false, false, true, false, false, false, true, true];
/// let changes: Vec<_> = results.map(|passed| checker.observe(passed)).into();
/// // The pass after two failures begins the count anew.
/// assert_eq!(changes[5], Some(false));
/// assert_eq!(changes[7], Some(true));
/// assert_eq!(changes.iter().flatten().count(), 2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checker {
    rise: u32,
    fall: u32,
    up: bool,
    /// Results in a row that speak against `up`.
    against: u32,
}

impl Checker {
    /// One that comes up after `rise` passes in a row and goes down after `fall` failures in
    /// a row (0 is taken for 1), and is `up` until then.
    pub fn new(rise: u32, fall: u32, up: bool) -> Self {
        Self { rise: rise.max(1), fall: fall.max(1), up, against: 0 }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// Takes a result in. Returns whether it is up if that has changed.
    pub fn observe(&mut self, passed: bool) -> Option<bool> {
        if passed == self.up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        if self.against < if passed { self.rise } else { self.fall } {
            return None;
        }
        self.against = 0;
        self.up = passed;
        Some(passed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_is_enough_where_one_is_asked() {
        let mut checker = Checker::new(1, 1, true);
        assert_eq!(checker.observe(true), None);
        assert_eq!(checker.observe(false), Some(false));
        assert_eq!(checker.observe(false), None);
        assert_eq!(checker.observe(true), Some(true));
    }

    #[test]
    fn what_begins_down_needs_rise_passes() {
        let mut checker = Checker::new(3, 1, false);
        let changes: Vec<_> = [true, true, false, true, true, true]
            .iter()
            .map(|passed| checker.observe(*passed))
            .collect();
        assert_eq!(changes, [None, None, None, None, None, Some(true)]);
    }

    proptest! {
        /// Against the rule as it is written: it changes exactly when the last `fall` (or
        /// `rise`) results since the last change all speak against it.
        #[test]
        fn it_follows_the_rule(
            rise in 1_u32..6,
            fall in 1_u32..6,
            begins in any::<bool>(),
            results in prop::collection::vec(any::<bool>(), 0..200),
        ) {
            let mut checker = Checker::new(rise, fall, begins);
            let (mut up, mut since) = (begins, 0);
            for (at, passed) in results.iter().enumerate() {
                let needed = if up { fall } else { rise } as usize;
                let recent = &results[since..=at];
                let changes =
                    recent.len() >= needed && recent.iter().rev().take(needed).all(|r| *r != up);
                if changes {
                    (up, since) = (!up, at + 1);
                }
                prop_assert_eq!(checker.observe(*passed), changes.then_some(up));
                prop_assert_eq!(checker.is_up(), up);
            }
        }
    }
}
