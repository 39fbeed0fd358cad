//! What others decide by, as it is commonly set up.

/// What was measured in a second.
pub(crate) struct Measured {
    pub(crate) control_connections: f64,
    pub(crate) canary_connections: f64,
    pub(crate) control_events: u64,
    pub(crate) canary_events: u64,
}

#[derive(Clone, Copy, Default)]
struct Side {
    connections: f64,
    events: f64,
}

impl Side {
    fn add(&mut self, connections: f64, events: u64) {
        self.connections += connections;
        self.events += events as f64;
    }

    fn rate(self) -> f64 {
        self.events / self.connections
    }
}

/// All of them, over the same seconds.
pub(crate) struct Rivals {
    alpha: f64,
    seconds: u32,
    control: Side,
    canary: Side,
    /// Of the last [`Self::WINDOW`] seconds.
    recent: (Side, Side),
    failed_measurements: u32,
    control_rates: Vec<f64>,
    canary_rates: Vec<f64>,
}

impl Rivals {
    pub(crate) const NAMES: [&str; 3] = [
        "success ≥ 99.6 % every 10 s, five failures",
        "z-test every second, p < 0.01",
        "Mann-Whitney every minute, p < 0.01",
    ];
    const WINDOW: u32 = 10;

    pub(crate) fn new(alpha: f64) -> Self {
        Self {
            alpha,
            seconds: 0,
            control: Side::default(),
            canary: Side::default(),
            recent: Default::default(),
            failed_measurements: 0,
            control_rates: Vec::new(),
            canary_rates: Vec::new(),
        }
    }

    /// Which of them abort now.
    pub(crate) fn watch(&mut self, measured: &Measured) -> [bool; 3] {
        let Measured { control_connections, canary_connections, control_events, canary_events } =
            *measured;
        self.seconds += 1;
        for side in [&mut self.control, &mut self.recent.0] {
            side.add(control_connections, control_events);
        }
        for side in [&mut self.canary, &mut self.recent.1] {
            side.add(canary_connections, canary_events);
        }
        let mut ranks = false;
        if self.seconds.is_multiple_of(Self::WINDOW) {
            let (control, canary) = std::mem::take(&mut self.recent);
            self.failed_measurements += u32::from(canary.rate() > 0.004);
            self.control_rates.push(control.rate());
            self.canary_rates.push(canary.rate());
            if self.seconds.is_multiple_of(60) {
                ranks = mann_whitney(&self.control_rates, &self.canary_rates) < self.alpha;
            }
        }
        let z_test = proportions(self.control, self.canary) < self.alpha;
        [self.failed_measurements >= 5, z_test, ranks]
    }
}

/// The chance of so much more on the canary, if both have the same rate (two proportions).
fn proportions(control: Side, canary: Side) -> f64 {
    let pooled = (control.events + canary.events) / (control.connections + canary.connections);
    let spread = pooled * (1.0 - pooled) * (1.0 / control.connections + 1.0 / canary.connections);
    if spread <= 0.0 {
        return 1.0;
    }
    upper_tail((canary.rate() - control.rate()) / spread.sqrt())
}

/// The chance of canary's values so high among control's, if both are alike (rank sums, with
/// ties).
fn mann_whitney(control: &[f64], canary: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = control.iter().map(|value| (*value, false)).collect();
    all.extend(canary.iter().map(|value| (*value, true)));
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (n, m) = (canary.len() as f64, control.len() as f64);
    let (mut ranks, mut ties, mut at) = (0.0, 0.0, 0);
    while at < all.len() {
        let same = all[at..].iter().take_while(|(value, _)| *value == all[at].0).count();
        let rank = at as f64 + (same as f64 + 1.0) / 2.0;
        ranks += rank * all[at..at + same].iter().filter(|(_, canary)| *canary).count() as f64;
        ties += (same as f64).powi(3) - same as f64;
        at += same;
    }
    let u = ranks - n * (n + 1.0) / 2.0;
    let total = n + m;
    let spread = n * m / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    if spread <= 0.0 {
        return 1.0;
    }
    upper_tail((u - n * m / 2.0) / spread.sqrt())
}

/// The chance of a standard normal value above `z` (Abramowitz and Stegun, 26.2.17).
fn upper_tail(z: f64) -> f64 {
    if z < 0.0 {
        return 1.0 - upper_tail(-z);
    }
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let factors = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let polynomial = factors.iter().rev().fold(0.0, |sum, factor| (sum + factor) * t);
    (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt() * polynomial
}

#[test]
fn they_reckon_as_tables_do() {
    assert!((upper_tail(2.326_348) - 0.01).abs() < 1e-6);
    assert!((upper_tail(-1.0) - 0.841_344_7).abs() < 1e-6);
    let side = |connections, events| Side { connections, events };
    // z = 2.9 for 0.2 % and 0.4 %, of 10,000 and 10,000: 1 - Φ(2.5854) by the pooled formula.
    assert!((proportions(side(1e4, 20.0), side(1e4, 40.0)) - 0.004_86).abs() < 1e-4);
    // Every value of the canary above every one of control: U = 25, z = 12.5 / √22.9167.
    let p = mann_whitney(&[1.0, 2.0, 3.0, 4.0, 5.0], &[6.0, 7.0, 8.0, 9.0, 10.0]);
    assert!((p - 0.004_512).abs() < 1e-5, "{p}");
    assert!((mann_whitney(&[1.0, 1.0], &[1.0, 1.0]) - 1.0).abs() < 1e-12);
}
