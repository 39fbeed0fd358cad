//! What chance allows: exact binomial intervals for observed shares.

/// Confidence of the intervals that the end-to-end tests use.
pub const CONFIDENCE: f64 = 0.999;

/// The exact (Clopper–Pearson) interval for a share of which `hits` in `trials` were seen.
///
/// C. J. Clopper and E. S. Pearson, *The use of confidence or fiducial limits
/// illustrated in the case of the binomial*, Biometrika 26 (1934).
///
/// # Panics
/// More hits than trials, or a confidence that is not between 0 and 1.
pub fn binomial_interval(hits: u64, trials: u64, confidence: f64) -> (f64, f64) {
    assert!(hits <= trials, "{hits} hits in {trials} trials");
    assert!(confidence > 0.0 && confidence < 1.0, "confidence {confidence}");
    let tail = (1.0 - confidence) / 2.0;
    let (k, n) = (hits as f64, trials as f64);
    let low = if hits == 0 { 0.0 } else { beta_quantile(tail, k, n - k + 1.0) };
    let high = if hits == trials { 1.0 } else { beta_quantile(1.0 - tail, k + 1.0, n - k) };
    (low, high)
}

/// Whether chance alone explains `hits` in `trials` at a true share, at [`CONFIDENCE`].
pub fn plausible(hits: u64, trials: u64, share: f64) -> bool {
    let (low, high) = binomial_interval(hits, trials, CONFIDENCE);
    (low..=high).contains(&share)
}

/// Asserts that chance alone explains what was seen.
///
/// # Panics
/// It does not: with the interval.
#[track_caller]
pub fn assert_share(what: &str, hits: u64, trials: u64, share: f64) {
    let (low, high) = binomial_interval(hits, trials, CONFIDENCE);
    assert!(
        (low..=high).contains(&share),
        "{what}: {hits} of {trials} is {:.4} %, which allows {:.4} % to {:.4} %, not {:.4} %",
        100.0 * hits as f64 / trials as f64,
        100.0 * low,
        100.0 * high,
        100.0 * share,
    );
}

/// The `p`-quantile of the beta distribution, by bisection to the last bit that matters.
fn beta_quantile(p: f64, a: f64, b: f64) -> f64 {
    /// Halvings until the interval is smaller than the spacing of numbers around it.
    const STEPS: usize = 200;
    let (mut low, mut high) = (0.0_f64, 1.0_f64);
    for _ in 0..STEPS {
        let middle = f64::midpoint(low, high);
        if regularized_beta(middle, a, b) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// The regularised incomplete beta function I_x(a, b), by its continued fraction.
///
/// W. H. Press et al., *Numerical Recipes*, 3rd edition, section 6.4.
fn regularized_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    let front = (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (-x).ln_1p()).exp();
    // The fraction converges fast on this side of the mean only.
    if x < (a + 1.0) / (a + b + 2.0) {
        front * beta_fraction(x, a, b) / a
    } else {
        1.0 - front * beta_fraction(1.0 - x, b, a) / b
    }
}

fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    /// Enough for a million trials: the number needed grows with their root.
    const TERMS: u32 = 20_000;
    const TINY: f64 = 1e-300;
    const PRECISION: f64 = 1e-15;
    let away_from_zero = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
    let mut fraction = d;
    for term in 1..TERMS {
        let m = f64::from(term);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / away_from_zero(1.0 + even * d);
        c = away_from_zero(1.0 + even / c);
        fraction *= d * c;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / away_from_zero(1.0 + odd * d);
        c = away_from_zero(1.0 + odd / c);
        let step = d * c;
        fraction *= step;
        if (step - 1.0).abs() < PRECISION {
            break;
        }
    }
    fraction
}

/// The logarithm of the gamma function for positive values, by Lanczos' approximation
/// (g = 7, nine terms; relative error below 1e-14).
fn ln_gamma(value: f64) -> f64 {
    const G: f64 = 7.0;
    const FIRST: f64 = 0.999_999_999_999_809_9;
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = value - 1.0;
    let sum =
        TERMS.iter().zip(1_u32..).fold(FIRST, |sum, (term, i)| sum + term / (x + f64::from(i)));
    let t = x + G + 0.5;
    0.5 * std::f64::consts::TAU.ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(actual: f64, expected: f64, tolerance: f64) {
        assert!((actual - expected).abs() <= tolerance, "{actual} is not {expected}");
    }

    #[test]
    fn ln_gamma_gives_factorials() {
        close(ln_gamma(1.0), 0.0, 1e-13);
        close(ln_gamma(5.0), 24.0_f64.ln(), 1e-12);
        close(ln_gamma(0.5), std::f64::consts::PI.sqrt().ln(), 1e-12);
        // ln(99!), as tabulated.
        close(ln_gamma(100.0), 359.134_205_369_575_4, 1e-9);
    }

    #[test]
    fn intervals_are_those_of_published_tables() {
        // Clopper and Pearson's 95 % limits for 0, 1, 5 and 10 of 10.
        for (hits, low, high) in
            [(0, 0.0, 0.3085), (1, 0.0025, 0.4450), (5, 0.1871, 0.8129), (10, 0.6915, 1.0)]
        {
            let interval = binomial_interval(hits, 10, 0.95);
            close(interval.0, low, 5e-5);
            close(interval.1, high, 5e-5);
        }
        // Newcombe, Statistics in Medicine 17 (1998), table I, method 5:
        // 81 of 263, 15 of 148, 1 of 29.
        for (hits, trials, low, high) in
            [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (1, 29, 0.0009, 0.1776)]
        {
            let interval = binomial_interval(hits, trials, 0.95);
            close(interval.0, low, 5e-5);
            close(interval.1, high, 5e-5);
        }
    }

    #[test]
    fn the_ends_follow_the_closed_form() {
        let n = 1_000_000_u64;
        // With no hit, the upper limit solves (1 - p)^n = tail.
        let expected = 1.0 - (0.0005_f64.ln() / n as f64).exp();
        close(binomial_interval(0, n, 0.999).1, expected, 1e-12);
        close(binomial_interval(n, n, 0.999).0, 1.0 - expected, 1e-12);
    }

    #[test]
    fn large_samples_come_close_to_the_normal_distribution() {
        let (low, high) = binomial_interval(500_000, 1_000_000, 0.999);
        let half = 3.290_526_731 * (0.25_f64 / 1e6).sqrt();
        close(low, 0.5 - half, 2e-6);
        close(high, 0.5 + half, 2e-6);
        assert!(plausible(500, 10_000, 0.05));
        assert!(!plausible(600, 10_000, 0.05));
    }
}
