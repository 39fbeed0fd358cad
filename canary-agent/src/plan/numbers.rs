//! Finding the few among many without a branch for each.

/// The numbers below `of` that `is` says yes to, ascending.
///
/// Whether a bucket moves is as good as chance. Asked one by one, the processor would foresee
/// many answers wrongly, which costs more than all the rest: so they are asked in groups of
/// sixty-four, and only a yes is looked at.
pub(crate) fn numbers(of: usize, is: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
    (0..of).step_by(64).flat_map(move |start| {
        let group = start..of.min(start + 64);
        let mut yes = group.fold(0_u64, |yes, n| yes | u64::from(is(n)) << (n - start));
        std::iter::from_fn(move || {
            let first = yes.trailing_zeros() as usize;
            (yes != 0).then(|| {
                yes &= yes - 1;
                start + first
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_a_filter_finds() {
        for of in [0, 1, 63, 64, 65, 1000] {
            for step in [1, 2, 63, 64, 65] {
                let is = |n: usize| n % step == step - 1;
                let expected: Vec<usize> = (0..of).filter(|n| is(*n)).collect();
                assert_eq!(numbers(of, is).collect::<Vec<_>>(), expected, "{of} {step}");
            }
        }
    }
}
