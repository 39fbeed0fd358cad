//! SPEC §4.4 and DESIGN §3: shares to one bucket, least movement, exact ways back, and how
//! owners and changes are written down.
#![cfg(feature = "user")]

use canary_ebpf_common::{
    abi::MAX_VERSIONS,
    compile::{
        Change, DecodeError, MAX_BUCKETS, OwnersError, SplitError, Targets, Wanted, apply, counts,
        decode_changes, decode_owners, encode_changes, encode_owners, initial_owners, plan, revert,
        targets,
    },
    share::Share,
};
use proptest::prelude::*;

fn share(text: &str) -> Share {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Changes `owners` to have `wanted` and returns the change.
fn go(owners: &mut [u8], control: u8, wanted: &[(u8, u32)], salt: u64) -> Vec<Change> {
    let wanted = Targets::exact(owners.len() as u32, control, wanted).unwrap();
    let changes = plan(owners, &wanted, salt).unwrap();
    apply(owners, &changes).unwrap();
    changes
}

fn owned(owners: &[u8], slot: u8) -> Vec<usize> {
    (0..owners.len()).filter(|&b| owners[b] == slot).collect()
}

#[test]
fn growth_within_a_rollout_is_nested_and_lowering_gives_back_the_last_first() {
    let mut owners = initial_owners(65_536, 3);
    let mut at = Vec::new();
    for count in [655, 3277, 32_768, 65_536] {
        go(&mut owners, 3, &[(1, count)], 42);
        at.push(owners.clone());
    }
    for pair in at.windows(2) {
        assert!(owned(&pair[0], 1).iter().all(|&b| pair[1][b] == 1));
    }
    for (count, then) in
        [(32_768, &at[2]), (3277, &at[1]), (655, &at[0]), (0, &initial_owners(65_536, 3))]
    {
        go(&mut owners, 3, &[(1, count)], 42);
        assert_eq!(&owners, then, "{count}");
    }
}

#[test]
fn versions_that_grow_together_from_control_shrink_together_to_where_they_were() {
    let mut owners = initial_owners(4096, 0);
    let mut at = Vec::new();
    for step in [0, 10, 100, 800] {
        go(&mut owners, 0, &[(1, step), (2, 2 * step), (7, step / 2)], 5);
        at.push((step, owners.clone()));
    }
    for (step, then) in at.into_iter().rev() {
        go(&mut owners, 0, &[(1, step), (2, 2 * step), (7, step / 2)], 5);
        assert_eq!(owners, then, "{step}");
    }
}

#[test]
fn another_salt_takes_other_buckets() {
    let first = |salt| {
        let mut owners = initial_owners(65_536, 0);
        go(&mut owners, 0, &[(1, 655)], salt);
        owned(&owners, 1)
    };
    let (a, b) = (first(1), first(2));
    let both = a.iter().filter(|x| b.contains(x)).count();
    // 6.55 expected of independent sets.
    assert!(both < 25, "{both}");
    // And they lie evenly: about a sixteenth in each sixteenth of the table.
    for part in 0..16 {
        let inside = a.iter().filter(|&&x| x / 4096 == part).count();
        assert!((15..=70).contains(&inside), "{inside} in part {part}");
    }
}

#[test]
fn what_one_version_loses_goes_straight_to_the_other() {
    let mut owners = initial_owners(4096, 0);
    go(&mut owners, 0, &[(1, 1000), (2, 1000)], 1);
    let changes = go(&mut owners, 0, &[(2, 2000)], 2);
    assert_eq!(changes.len(), 1000);
    assert!(changes.iter().all(|c| (c.from, c.to) == (1, 2)));
}

fn unchanged_and_changed(wanted: &[(u8, &str, bool)]) -> Vec<Wanted> {
    wanted
        .iter()
        .map(|&(slot, text, changed)| Wanted { slot, share: share(text), changed })
        .collect()
}

fn rounded(present: &[(u8, u32)], wanted: &[(u8, &str, bool)]) -> Vec<u32> {
    let present = Targets::exact(65_536, 0, present).unwrap();
    let targets = targets(present.counts(), 0, &unchanged_and_changed(wanted)).unwrap();
    assert_eq!(targets.buckets(), 65_536);
    [0].into_iter()
        .chain(wanted.iter().map(|w| w.0))
        .map(|slot| targets.counts()[usize::from(slot)])
        .collect()
}

#[test]
fn a_whole_split_is_rounded_to_one_bucket() {
    for (wanted, counts) in [
        (&[][..], vec![65_536]),
        (&[(1, "5%", true)], vec![62_259, 3277]),
        (&[(1, "50%", true), (2, "50%", true)], vec![0, 32_768, 32_768]),
        (
            &[(1, "33.333333333%", true), (2, "33.333333333%", true), (3, "33.333333334%", true)],
            vec![1, 21_845, 21_845, 21_845],
        ),
        // Control's share is 0.0001 %: not nothing.
        (&[(1, "50%", true), (2, "49.9999%", true)], vec![1, 32_768, 32_767]),
        // 21845.6, 21845.6 and 21844.8, each rounded up, are one too many.
        (
            &[(1, "33.333740234%", true), (2, "33.333740234%", true), (3, "33.332519532%", true)],
            vec![0, 21_845, 21_846, 21_845],
        ),
        (&[(1, "0.000001%", true)], vec![65_535, 1]),
        (&[(1, "99.999999%", true)], vec![1, 65_535]),
        (&[(1, "99.999999%", true), (2, "0.000001%", true)], vec![0, 65_535, 1]),
        (
            &[(1, "99.999998%", true), (2, "0.000001%", true), (3, "0.000001%", true)],
            vec![0, 65_534, 1, 1],
        ),
        (&[(1, "100%", true), (2, "0%", true)], vec![0, 65_536, 0]),
    ] {
        assert_eq!(rounded(&[], wanted), counts, "{wanted:?}");
    }
}

#[test]
fn rounding_takes_nothing_from_a_version_that_nobody_changes() {
    // 32767.5 was once rounded up; the second, 32768.5, has to make do with 32,768.
    assert_eq!(
        rounded(&[(1, 32_768)], &[(1, "49.99923706%", false), (2, "50.00076294%", true)]),
        [0, 32_768, 32_768]
    );
    // What was once trimmed stays so when there is room again.
    assert_eq!(rounded(&[(1, 3276)], &[(1, "5%", false), (2, "1%", true)]), [61_605, 3276, 655]);
    // Not in force yet: rounded although unchanged.
    assert_eq!(rounded(&[], &[(1, "5%", false)]), [62_259, 3277]);
}

#[test]
fn a_split_that_cannot_be_says_why() {
    let try_it = |control, wanted: &[(u8, &str, bool)]| {
        let mut present = [0; MAX_VERSIONS];
        present[0] = 65_536;
        targets(&present, control, &unchanged_and_changed(wanted)).unwrap_err()
    };
    assert_eq!(
        try_it(0, &[(1, "60%", true), (2, "50%", true)]),
        SplitError::AboveWhole { wanted: 72_090, buckets: 65_536 }
    );
    assert_eq!(try_it(0, &[(0, "1%", true)]), SplitError::ControlHasShare(0));
    assert_eq!(try_it(0, &[(16, "1%", true)]), SplitError::UnknownSlot(16));
    assert_eq!(try_it(16, &[]), SplitError::UnknownSlot(16));
    assert_eq!(try_it(0, &[(1, "1%", true), (1, "1%", true)]), SplitError::Duplicate(1));
    assert_eq!(targets(&[0; MAX_VERSIONS], 0, &[]), Err(SplitError::BucketCount(0)));
    assert_eq!(
        Targets::exact(8, 0, &[(1, 5), (2, 4)]),
        Err(SplitError::AboveWhole { wanted: 9, buckets: 8 })
    );
    assert_eq!(Targets::exact(0, 0, &[]), Err(SplitError::BucketCount(0)));
}

#[test]
fn a_plan_for_other_owners_is_refused() {
    let wanted = Targets::exact(8, 0, &[(1, 4)]).unwrap();
    assert_eq!(
        plan(&[0; 16], &wanted, 0),
        Err(OwnersError::BucketsDiffer { owners: 16, wanted: 8 })
    );
    assert_eq!(
        plan(&[0, 0, 99, 0, 0, 0, 0, 0], &wanted, 0),
        Err(OwnersError::UnknownSlot { bucket: 2, slot: 99 })
    );
    assert_eq!(plan(&[], &wanted, 0), Err(OwnersError::BucketCount(0)));
}

#[test]
fn a_change_for_other_owners_is_refused_whole() {
    let before = vec![0, 0, 0, 1];
    let mut owners = before.clone();
    let change = |bucket, from, to| Change { bucket, from, to };
    let list = [change(0, 0, 1), change(3, 0, 1)];
    let differs = OwnersError::OwnerDiffers { bucket: 3, expected: 0, found: 1 };
    assert_eq!(apply(&mut owners, &list), Err(differs));
    assert_eq!(owners, before);
    assert_eq!(
        apply(&mut owners, &[change(1, 0, 2), change(4, 0, 1)]),
        Err(OwnersError::NoSuchBucket(4))
    );
    assert_eq!(owners, before);
    let list = [change(0, 0, 1), change(3, 0, 1)];
    let differs = OwnersError::OwnerDiffers { bucket: 0, expected: 1, found: 0 };
    assert_eq!(revert(&mut owners, &list), Err(differs));
    assert_eq!(owners, before);
}

#[test]
fn bytes_that_are_no_owners_or_changes_say_why() {
    let none = |expected, found| DecodeError::Format { expected, found };
    for (bytes, error) in [
        (&[][..], none(1, None)),
        (&[2, 0, 1], none(1, Some(2))),
        (&[1, 0], DecodeError::Truncated),
        (&[1, 0, 0x80], DecodeError::Truncated),
        (&[1, 0, 0], DecodeError::Empty),
        (&[1, 0, 0x80, 0], DecodeError::Number),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0x1f], DecodeError::Number),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff], DecodeError::Number),
        (&[1, 0, 0xff, 0xff, 0xff, 0xff, 0x0f], DecodeError::TooMany),
        (&[1, 16, 1], DecodeError::UnknownSlot(16)),
    ] {
        assert_eq!(decode_owners(bytes), Err(error), "{bytes:?}");
    }
    for (bytes, error) in [
        (&[1][..], none(2, Some(1))),
        (&[2, 0], DecodeError::Truncated),
        (&[2, 0, 1, 0], DecodeError::Empty),
        (&[2, 0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, 1], DecodeError::Truncated),
        (&[2, 0, 77, 1, 1], DecodeError::UnknownSlot(77)),
        (&[2, 0, 1, 1, 0xff, 0xff, 0xff, 0xff, 0x0f], DecodeError::TooMany),
    ] {
        assert_eq!(decode_changes(bytes), Err(error), "{bytes:?}");
    }
    assert_eq!(decode_owners(&[1]), Ok(vec![]));
    assert_eq!(decode_changes(&[2]), Ok(vec![]));
}

#[test]
fn the_formats_are_small_and_stay_as_they_are() {
    assert_eq!(encode_owners(&[3, 3, 3, 0]), [1, 3, 3, 0, 1]);
    let list = [Change { bucket: 7, from: 0, to: 1 }, Change { bucket: 300, from: 0, to: 1 }];
    assert_eq!(encode_changes(&list), [2, 0, 1, 2, 7, 0xa5, 2]);
    let mut owners = initial_owners(65_536, 0);
    assert_eq!(encode_owners(&owners).len(), 5);
    let changes = go(&mut owners, 0, &[(1, 3277)], 9);
    // A bit for each bucket, after the format, the buckets and the slots.
    assert_eq!(encode_owners(&owners).len(), 8192 + 1 + 3 + 1 + 2);
    assert!(encode_changes(&changes).len() < 3600, "{}", encode_changes(&changes).len());
    let changes = go(&mut owners, 0, &[(1, 32_768)], 9);
    assert_eq!(encode_owners(&owners).len(), 8192 + 1 + 3 + 1 + 2);
    assert!(encode_changes(&changes).len() <= 8192 + 1 + 2 + 3);
    go(&mut owners, 0, &[(1, 20_000), (2, 20_000)], 9);
    assert_eq!(encode_owners(&owners).len(), 2 * 8192 + 1 + 3 + 1 + 3);
    assert_eq!(encode_owners(&initial_owners(MAX_BUCKETS, 0)).len(), 5);

    let alternating: Vec<u8> = (0..70).map(|bucket| [1, 5, 2][bucket % 3]).collect();
    let mut bits = vec![4, 70, 3, 1, 2, 5];
    // The second slot is 2, every third bucket from 2 on; the third is 5, every third from 1 on.
    bits.extend([0x4924_9249_2492_4924_u64, 0b010010].map(u64::to_le_bytes).concat());
    bits.extend([0x2492_4924_9249_2492_u64, 0b001001].map(u64::to_le_bytes).concat());
    assert_eq!(encode_owners(&alternating), bits);
    assert_eq!(decode_owners(&bits), Ok(alternating));
    let many: Vec<Change> =
        (0..64).filter(|n| n % 4 != 0).map(|bucket| Change { bucket, from: 0, to: 1 }).collect();
    let bits = [&[5, 0, 1, 64][..], &[0xee; 8]].concat();
    assert_eq!(encode_changes(&many), bits);
    assert_eq!(decode_changes(&bits), Ok(many.clone()));
    let backwards: Vec<Change> = many.into_iter().rev().collect();
    assert_eq!(encode_changes(&backwards)[0], 2, "an order that bits can't tell");
}

#[test]
fn bits_that_are_no_owners_or_changes_say_why() {
    for (bytes, error) in [
        (vec![4], DecodeError::Truncated),
        (vec![4, 64, 0], DecodeError::Truncated),
        (vec![4, 0, 1, 0], DecodeError::Truncated),
        (vec![4, 64, 2, 0, 1], DecodeError::Truncated),
        (vec![4, 64, 2, 0, 16], DecodeError::UnknownSlot(16)),
        ([&[4, 64, 3, 0, 1, 2][..], &[0xff; 16]].concat(), DecodeError::UnknownSlot(3)),
        ([&[4, 64, 2, 0, 1][..], &[0; 9]].concat(), DecodeError::Truncated),
        (vec![4, 0x81, 0x80, 0x40, 1, 0], DecodeError::TooMany),
    ] {
        assert_eq!(decode_owners(&bytes), Err(error), "{bytes:?}");
    }
    for (bytes, error) in [
        (vec![5, 0], DecodeError::Truncated),
        (vec![5, 0, 1, 64], DecodeError::Truncated),
        ([&[5, 0, 1, 63][..], &[0xff; 8]].concat(), DecodeError::TooMany),
        ([&[5, 0, 16, 64][..], &[0xff; 8]].concat(), DecodeError::UnknownSlot(16)),
    ] {
        assert_eq!(decode_changes(&bytes), Err(error), "{bytes:?}");
    }
}

/// Numbers of buckets for up to seven versions beside control (slot 0), together at most `total`.
fn splits(total: u32) -> impl Strategy<Value = Vec<(u8, u32)>> {
    proptest::collection::vec(prop_oneof![Just(0.0), 0.0..1.0_f64, 0.0..0.02_f64], 7).prop_map(
        move |parts| {
            let sum: f64 = parts.iter().sum::<f64>().max(1.0);
            let count =
                |(i, part): (usize, f64)| (i as u8 + 1, (part / sum * f64::from(total)) as u32);
            parts.into_iter().enumerate().map(count).collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_sequence_of_splits_moves_the_least_and_can_be_taken_back(
        steps in proptest::collection::vec((splits(4096), 0..4_u64), 1..8),
    ) {
        let mut owners = initial_owners(4096, 0);
        let mut taken = Vec::new();
        for (wanted, salt) in steps {
            let before = owners.clone();
            let had = counts(&before).unwrap();
            let changes = go(&mut owners, 0, &wanted, salt);
            let has = counts(&owners).unwrap();
            for (slot, count) in &wanted {
                prop_assert_eq!(has[usize::from(*slot)], *count);
            }
            // A bucket can add to one version only, so the sum of growth is the least.
            let growth: u32 = has.iter().zip(&had).map(|(now, then)| now.saturating_sub(*then)).sum();
            prop_assert_eq!(changes.len() as u32, growth);
            prop_assert!(changes.windows(2).all(|pair| pair[0].bucket < pair[1].bucket));
            for change in &changes {
                let (from, to) = (usize::from(change.from), usize::from(change.to));
                prop_assert!(has[from] < had[from], "{change:?}: a version that does not shrink loses");
                prop_assert!(has[to] > had[to], "{change:?}: a version that does not grow gets");
            }
            prop_assert_eq!(&decode_owners(&encode_owners(&owners)).unwrap(), &owners);
            prop_assert_eq!(&decode_changes(&encode_changes(&changes)).unwrap(), &changes);
            taken.push((before, changes));
        }
        for (before, changes) in taken.into_iter().rev() {
            revert(&mut owners, &changes).unwrap();
            prop_assert_eq!(&owners, &before);
        }
    }

    #[test]
    fn rounding_a_split_is_exact_to_one_bucket(
        parts in proptest::collection::vec((0..=1_000_000_u64, any::<bool>()), 1..15),
        whole in any::<bool>(),
        bits in 12..=20_u32,
    ) {
        let total = 1_u32 << bits;
        // In units of a ten-millionth; together the whole, or a part of it.
        let sum: u64 = parts.iter().map(|p| p.0).sum::<u64>().max(1);
        let full: u64 = if whole { 10_000_000 } else { 7_654_321 };
        let mut units: Vec<u64> = parts.iter().map(|p| p.0 * full / sum).collect();
        let rest = full - units.iter().sum::<u64>();
        units[0] += if parts[0].0 > 0 { rest } else { 0 };
        let shares: Vec<Share> =
            units.iter().map(|u| share(&format!("{}.{:05}%", u / 100_000, u % 100_000))).collect();
        let wanted: Vec<Wanted> = shares
            .iter()
            .zip(1..)
            .map(|(&share, slot)| Wanted { slot, share, changed: true })
            .collect();
        let mut present = [0; MAX_VERSIONS];
        present[0] = total;
        let first = targets(&present, 0, &wanted).unwrap();
        prop_assert_eq!(first.buckets(), total);
        let smallest = units.iter().filter(|&&u| u > 0).min().copied().unwrap_or(0);
        let all_above_a_bucket = smallest as f64 / 1e7 * f64::from(total) >= 1.0;
        for (share, slot) in shares.iter().zip(1..) {
            let count = first.counts()[slot];
            let exact = share.fraction() * f64::from(total);
            prop_assert_eq!(count == 0, *share == Share::ZERO);
            prop_assert!(count < total || *share == Share::ALL);
            if all_above_a_bucket {
                prop_assert!((f64::from(count) - exact).abs() <= 1.0, "{count} for {exact}");
            }
        }
        if units.iter().sum::<u64>() < 10_000_000 {
            prop_assert!(first.counts()[0] > 0, "control has a share and no bucket");
        }
        // Some of it changed again to the same: nothing moves, and the unchanged never do.
        let again: Vec<Wanted> = wanted
            .iter()
            .zip(&parts)
            .map(|(w, &(_, changed))| Wanted { changed, ..*w })
            .collect();
        let second = targets(first.counts(), 0, &again).unwrap();
        for w in again.iter().filter(|w| !w.changed) {
            prop_assert_eq!(second.counts()[usize::from(w.slot)], first.counts()[usize::from(w.slot)]);
        }
    }

    #[test]
    fn decoding_ends_with_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64), format in 0..6_u8) {
        let bytes: Vec<u8> = [format].into_iter().chain(bytes).collect();
        if let Ok(owners) = decode_owners(&bytes) {
            prop_assert!(owners.len() <= MAX_BUCKETS as usize);
            prop_assert_eq!(decode_owners(&encode_owners(&owners)).unwrap(), owners);
        }
        if let Ok(changes) = decode_changes(&bytes) {
            prop_assert_eq!(decode_changes(&encode_changes(&changes)).unwrap(), changes);
        }
    }
}
