//! How long a million networks take to compile, in how many prefixes they end, and how much of
//! them a day's change touches:
//! `cargo run --release -p canary-ebpf-common --features user --example networks_times`.

#[cfg(feature = "user")]
fn main() {
    measure::all();
}

#[cfg(not(feature = "user"))]
fn main() {
    eprintln!("the compiler of networks needs the feature `user`");
}

#[cfg(feature = "user")]
mod measure {
    use std::time::Instant;

    use canary_ebpf_common::networks::{Labelled, Prefix, Width, combine, difference, flatten};

    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Networks as long as those of tables of places: most of them /22 to /28, or /36 to /48.
    fn network(width: Width, state: &mut u64) -> Prefix {
        let len = match width {
            Width::V4 => 22 + random(state) % 7,
            Width::V6 => 36 + random(state) % 13,
        };
        let top = match width {
            Width::V4 => random(state) >> 32 << 32,
            // 2000::/3 alone is given out, and far from all of it.
            Width::V6 => 0x2000 << 48 | random(state) >> 4 & 0x0fff_ffff_ffff_ffff,
        };
        Prefix::new(u128::from(top) << 64, len as u8)
    }

    fn compiled(width: Width, items: &[(Prefix, u8)]) -> Labelled<u8> {
        flatten(
            width,
            items.to_vec(),
            0,
            |first, route| if first == 0 { route } else { first.min(route) },
            |x| x,
        )
    }

    pub(super) fn all() {
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        for (width, count) in [(Width::V4, 100_000), (Width::V4, 1_000_000), (Width::V6, 1_000_000)]
        {
            let mut state = 1;
            let items: Vec<(Prefix, u8)> =
                (0..count).map(|at| (network(width, &mut state), 1 + (at % 3) as u8)).collect();
            let begun = Instant::now();
            let flat = compiled(width, &items);
            println!(
                "{width:?}, {count} networks of 3 routes: {:.0} ms, {} prefixes",
                ms(begun),
                flat.prefixes().len()
            );
            let begun = Instant::now();
            let both = combine(&flat, &flat, |a, b| (a, b));
            println!(
                "  together with themselves: {:.0} ms, {} prefixes",
                ms(begun),
                both.prefixes().len()
            );
        }
        let (mut state, days, count) = (2, 30, 500_000);
        let mut items: Vec<(Prefix, u8)> =
            (0..count).map(|_| (network(Width::V4, &mut state), 1)).collect();
        let mut flat = compiled(Width::V4, &items);
        let (mut touched, mut spent) = (0, 0.0);
        for _ in 0..days {
            for _ in 0..count / 100 {
                let at = random(&mut state) as usize % items.len();
                items[at].0 = network(Width::V4, &mut state);
            }
            let begun = Instant::now();
            let next = compiled(Width::V4, &items);
            touched += difference(&flat, &next).writes.len();
            spent += ms(begun);
            flat = next;
        }
        println!(
            "{count} networks, {} change a day, {days} days: {:.0} ms and {} prefixes written a day",
            count / 100,
            spent / f64::from(days),
            touched / days as usize
        );
    }
}
