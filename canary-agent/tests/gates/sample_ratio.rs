//! The guard of the splitter.

use canary_agent::rollout::sample_ratio::{Departure, SampleRatio};
use rand_pcg::Pcg64Mcg;

use crate::simulation::{binomial, random};

/// After how many windows of `connections` the guard speaks, of 3,600.
fn speaks(rng: &mut Pcg64Mcg, asked: f64, is: f64, connections: u64) -> Option<(u32, Departure)> {
    let mut guard = SampleRatio::new(1.05);
    for window in 1..=3600 {
        let canary = binomial(rng, connections, is);
        guard.add(asked, connections - canary, canary);
        if let Some(departure) = guard.departure(0.001) {
            return Some((window, departure));
        }
    }
    None
}

#[test]
fn a_splitter_that_is_right_is_believed_and_one_that_is_off_is_found() {
    let mut rng = random(1);
    for asked in [0.001, 0.05, 0.5, 0.9] {
        let spoke = (0..20).filter(|_| speaks(&mut rng, asked, asked, 2_000).is_some()).count();
        assert_eq!(spoke, 0, "at {asked}");
    }
    // 50:50 instead of 95:5, as a ring does that ignores weights.
    let (windows, departure) = speaks(&mut rng, 0.05, 0.5, 100).expect("it speaks");
    assert!(windows <= 2, "{windows}");
    assert_eq!(departure, Departure::More);
    let (windows, departure) = speaks(&mut rng, 0.05, 0.03, 2_000).expect("it speaks");
    assert!(windows < 60, "{windows}");
    assert_eq!(departure, Departure::Fewer);
    assert_eq!(speaks(&mut rng, 0.05, 0.0, 2_000).expect("it speaks").1, Departure::Fewer);
}

#[test]
fn it_goes_on_where_it_was() {
    let mut guard = SampleRatio::new(1.05);
    guard.add(0.1, 9_017, 983);
    let kept = serde_json::to_string(&guard).expect("serialisable");
    let mut again: SampleRatio = serde_json::from_str(&kept).expect("reads back");
    guard.add(0.2, 8_100, 1_900);
    again.add(0.2, 8_100, 1_900);
    assert_eq!(guard, again);
    assert_eq!((again.control_connections, again.canary_connections), (17_117, 2_883));
}
