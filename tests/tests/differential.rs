//! The loaded program and the model agree on random frames, byte by byte.
//!
//! `CANARY_SEED` begins where a run has said that it began; `CANARY_FRAMES` says how many frames
//! there are.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use canary_tests::{
    asked,
    cases::Suite,
    differential::{Corpus, Frames, LIFE, Pair, record},
};

/// Frames, unless it is said otherwise.
const FRAMES: u64 = 5_000_000;

#[test]
fn program_and_model_agree_on_random_frames() {
    let frames = asked::number("CANARY_FRAMES").unwrap_or(FRAMES);
    let first = asked::seed();
    println!("differential: CANARY_SEED={first} CANARY_FRAMES={frames}");
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let suite = Suite::read(&cases).expect("the cases");
    let mut corpus = Corpus::default();
    suite.cases.iter().flat_map(|(case, _)| case.frames()).for_each(|frame| corpus.add(&frame));
    println!("{} frames of cases to begin with", corpus.len());
    // What is recorded differs from run to run, so that a seed would not give a run again. A
    // difference is told with all frames that show it.
    if asked::number("CANARY_SEED").is_none() {
        let (recorded, programs) = record();
        recorded.iter().for_each(|frame| corpus.add(frame));
        println!("and {} of {programs:?}", recorded.len());
        assert!(programs.iter().any(|name| name == "curl"), "curl has to be there");
    }
    let lives = frames.div_ceil(LIFE as u64);
    let (next, sent) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut pair = Pair::new(&cases).expect("root, and a program");
                loop {
                    let life = next.fetch_add(1, Ordering::Relaxed);
                    if life >= lives {
                        break;
                    }
                    let count = (frames - life * LIFE as u64).min(LIFE as u64) as usize;
                    // A seed for each: lives do not depend on which thread they are of.
                    let seed = first.wrapping_add(life);
                    let mut made = Frames::new(&corpus, seed);
                    match pair.live(&mut made, count).expect("a life") {
                        Ok(out) => _ = sent.fetch_add(out as u64, Ordering::Relaxed),
                        Err(difference) => {
                            next.store(lives, Ordering::Relaxed);
                            let told = pair.told(&difference).expect("a smaller one");
                            panic!(
                                "frame {} of CANARY_SEED={seed} CANARY_FRAMES={}:\n{}\n{told}",
                                difference.nth,
                                difference.nth + 1,
                                difference.what,
                            );
                        }
                    }
                }
            });
        }
    });
    let took = begun.elapsed();
    let each = took.checked_div(frames.try_into().unwrap_or(u32::MAX)).unwrap_or(Duration::ZERO);
    println!("{frames} frames in {took:.1?}, {each:?} each; {sent:?} came out otherwise");
    assert!(sent.into_inner() > frames / 10, "frames that show little");
}
