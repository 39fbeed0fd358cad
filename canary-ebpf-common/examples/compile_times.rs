//! How long the table compiler takes on a processor: prints the median and the least of several runs.
//!
//! `cargo run --release --example compile_times -p canary-ebpf-common --features user`

#[cfg(feature = "user")]
fn main() {
    measure::all();
}

#[cfg(not(feature = "user"))]
fn main() {
    eprintln!("the table compiler needs the feature `user`");
}

#[cfg(feature = "user")]
mod measure {
    use std::time::Duration;

    use canary_ebpf_common::compile::{
        Backend, Compiler, Fallback, Input, Targets, Version, apply, initial_owners, plan,
    };

    use nix::time::{ClockId, clock_gettime};

    const BUCKETS: u32 = 65_536;

    fn on_processor() -> Duration {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every kernel has it").into()
    }

    fn backends(version: u64, count: u64, heaviest: u64) -> Vec<Backend> {
        (0..count)
            .map(|i| {
                let identity = (version << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                Backend { identity, weight: (1 + identity % heaviest) as u32, healthy: true }
            })
            .collect()
    }

    fn report(what: &str, mut run: impl FnMut() -> Duration) {
        let mut times: Vec<Duration> = (0..21).map(|_| run()).collect();
        times.sort_unstable();
        println!("{what:<58} median {:>10.3?}  least {:>10.3?}", times[10], times[0]);
    }

    fn owners_at(permille: u32) -> Vec<u8> {
        let mut owners = initial_owners(BUCKETS, 0);
        let wanted = split(permille);
        let changes = plan(&owners, &wanted, 7).expect("owners fit");
        apply(&mut owners, &changes).expect("the plan is for these owners");
        owners
    }

    fn split(permille: u32) -> Targets {
        Targets::exact(BUCKETS, 0, &[(1, BUCKETS / 1000 * permille)]).expect("less than all")
    }

    fn table_of<'a>(owners: &'a [u8], versions: &'a [Version<'a>]) -> Input<'a> {
        Input { owners, versions, control: 0, fallback: Fallback::Control }
    }

    pub(super) fn all() {
        for heaviest in [1, 10] {
            let (stable, canary) = (backends(0, 100, heaviest), backends(1, 100, heaviest));
            let versions = [
                Version { slot: 0, backends: &stable, placement: None },
                Version { slot: 1, backends: &canary, placement: None },
            ];
            let weights = if heaviest == 1 { "equal weights" } else { "weights 1 to 10" };

            let owners = initial_owners(BUCKETS, 0);
            report(&format!("whole table, 100 backends, {weights}"), || {
                let start = on_processor();
                let table = Compiler::new().compile(&table_of(&owners, &versions)).expect("valid");
                let took = on_processor() - start;
                assert!(table.targets.iter().all(Option::is_some));
                took
            });
            for (from, to) in [(50, 60), (500, 510), (0, 1000), (510, 50)] {
                let before = owners_at(from);
                let wanted = split(to);
                report(
                    &format!("split {}% to {}%, 2 x 100, {weights}", from / 10, to / 10),
                    || {
                        let mut compiler = Compiler::new();
                        compiler.compile(&table_of(&before, &versions)).expect("valid");
                        let mut owners = before.clone();
                        let start = on_processor();
                        let changes = plan(&owners, &wanted, 7).expect("owners fit");
                        apply(&mut owners, &changes).expect("the plan is for these owners");
                        compiler.compile(&table_of(&owners, &versions)).expect("valid");
                        on_processor() - start
                    },
                );
            }
            for down in [1, 10, 50] {
                let mut failing = stable.clone();
                failing.iter_mut().take(down).for_each(|backend| backend.healthy = false);
                let after = [Version { slot: 0, backends: &failing, placement: None }];
                report(&format!("{down} of 100 backends fail, {weights}"), || {
                    let mut compiler = Compiler::new();
                    compiler.compile(&table_of(&owners, &versions)).expect("valid");
                    let start = on_processor();
                    compiler.compile(&table_of(&owners, &after)).expect("valid");
                    on_processor() - start
                });
            }
        }
    }
}
