//! What answers.

use std::net::IpAddr;

use canary_agent::audience::{
    expression::Expression,
    mmdb::{Database, MmdbError, Selected},
};
use canary_ebpf_common::networks::Width;
use maxminddb::MaxMindDbError;
use proptest::prelude::*;

use crate::writer::{Data, Writer};

fn place(country: &'static str, subdivision: Option<&'static str>) -> Data {
    let code = |code| Data::Map(vec![("iso_code", Data::Text(code))]);
    let mut map = vec![("country", code(country))];
    if let Some(subdivision) = subdivision {
        map.push(("subdivisions", Data::List(vec![code(subdivision)])));
    }
    map.push((
        "location",
        Data::Map(vec![("latitude", Data::Double(41.6)), ("accuracy_radius", Data::U16(20))]),
    ));
    Data::Map(map)
}

/// Nested, with IPv4 inside IPv6 and its aliases, and with odd lengths.
fn cities(record_bits: u16) -> Vec<u8> {
    cities_in(Writer::new(true), record_bits)
}

fn cities_in(mut file: Writer, record_bits: u16) -> Vec<u8> {
    let iowa = place("US", Some("IA"));
    file.add("81.2.69.0/24", &place("GB", None));
    file.add("12.0.0.0/8", &place("US", None));
    file.add("12.34.56.0/21", &iowa);
    file.add("12.34.57.128/25", &place("US", Some("NE")));
    file.add("12.99.0.1/32", &iowa);
    file.add("2001:db8::/33", &iowa);
    file.add("2a02:d000::/29", &place("GB", None));
    for alias in ["::ffff:0:0/96", "2002::/16", "2001::/32"] {
        file.alias(alias);
    }
    file.finish(record_bits)
}

fn select(bytes: &[u8], text: &str) -> Result<Selected, MmdbError> {
    let file = Database::from_bytes("City.mmdb".to_owned(), bytes.to_vec())?;
    file.select(&Expression::parse(text)?)
}

#[test]
fn users_living_in_iowa_are_one_line() {
    for record_bits in [24, 28, 32] {
        let file = cities(record_bits);
        let text = r#"country.iso_code == "US" && subdivisions.0.iso_code == "IA""#;
        let found = select(&file, text).unwrap();
        let shown: Vec<String> = found.networks.iter().map(|net| net.to_string()).collect();
        let expected = [
            "12.34.56.0/24",
            "12.34.57.0/25",
            "12.34.58.0/23",
            "12.34.60.0/22",
            "12.99.0.1/32",
            "2001:db8::/33",
        ];
        assert_eq!(shown, expected, "{record_bits}");
        assert_eq!((found.records, found.answering), (4, 1));
        assert_eq!(found.networks.addresses(Width::V4), 8 * 256 - 128 + 1);
        assert_eq!(found.networks.addresses(Width::V6), 1 << 95);
        let about = Database::from_bytes(String::new(), file).unwrap().about();
        assert_eq!((about.kind.as_str(), about.v6), ("Test-City", true));
    }
}

#[test]
fn the_whole_of_ipv4_may_lie_under_one_record() {
    let mut file = Writer::new(true);
    file.add("::/32", &place("US", None));
    file.add("2001:db8::/32", &place("GB", None));
    let found = select(&file.finish(24), r#"country.iso_code == "US""#).unwrap();
    assert!(found.networks.find("203.0.113.1".parse().unwrap()).is_some());
    assert!(found.networks.find("2001:db8::1".parse().unwrap()).is_none());
}

#[test]
fn every_kind_of_value_can_be_asked_for() {
    let mut file = Writer::new(false);
    let all = Data::Map(vec![
        ("text", Data::Text("x")),
        ("long", Data::Text("a text of more than twenty-eight bytes, and of less than 285")),
        ("double", Data::Double(-1.5)),
        ("u16", Data::U16(7)),
        ("u32", Data::U32(70_000)),
        ("u64", Data::U64(1 << 40)),
        ("u128", Data::U128(1 << 70)),
        ("i32", Data::I32(-7)),
        ("yes", Data::Truth(true)),
        ("no", Data::Truth(false)),
        ("list", Data::List(vec![Data::U16(1), Data::Map(vec![("a", Data::U16(2))])])),
    ]);
    file.add("192.0.2.0/25", &all);
    let file = file.finish(24);
    for text in [
        r#"text == "x""#,
        r#"long != "x""#,
        "double == -1.5",
        "u16 in [6, 7]",
        "u32 > 69999",
        "u64 >= 1e12",
        "u128 > 1e21",
        "i32 < 0",
        "yes",
        "no == false",
        "list.0 == 1 && list.1.a == 2",
        "exists(list)",
    ] {
        let found = select(&file, text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(found.networks.len(), 1, "{text}");
    }
}

#[test]
fn an_expression_that_does_not_fit_is_refused_with_its_place() {
    let file = cities(24);
    for (text, message, help) in [
        (
            r#"country.iso == "US""#,
            "no record of `City.mmdb` has `country.iso`",
            Some("did you mean `country.iso_code`?"),
        ),
        ("location.latitude == \"41\"", "`location.latitude` is a number in `City.mmdb`", None),
        (
            "subdivisions.7.iso_code == \"IA\"",
            "no record of",
            Some("did you mean `subdivisions.0.iso_code`?"),
        ),
    ] {
        match select(&file, text) {
            Err(MmdbError::Expression(error)) => {
                assert!(error.message.contains(message), "{text}: {error}");
                assert_eq!(error.span.start, 0);
                assert_eq!(error.help.as_deref(), help, "{text}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn what_is_no_such_file_is_refused() {
    let whole = cities(24);
    for bytes in [&b""[..], b"[agent]\n", &whole[..whole.len() / 2]] {
        let error = select(bytes, "exists(country)").unwrap_err();
        assert!(matches!(error, MmdbError::Damaged(_)), "{error}");
    }
}

/// As writers of one's own files leave it.
#[test]
fn a_file_without_a_description_is_read_and_looked_through() {
    let mut file = Writer::new(true).undescribed();
    file.add("192.0.2.0/24", &place("US", None));
    let bytes = file.finish(24);
    let found = select(&bytes, r#"country.iso_code == "US""#).unwrap();
    assert_eq!(found.networks.len(), 1);
    // The text of its record is longer than what is left.
    let at = bytes.windows(2).position(|two| two == b"US").expect("the record");
    let mut broken = bytes.clone();
    broken[at - 1] = 2 << 5 | 31;
    let error = select(&broken, "exists(country)").unwrap_err();
    assert!(matches!(error, MmdbError::Damaged(_)), "{error}");
}

/// Each record is sixteen times the one before: the last would be a million values, and a few more
/// of them more than there is memory. The reader's own limit is what holds here.
#[test]
fn a_record_that_names_itself_over_and_over_is_refused() {
    let mut file = Writer::new(true);
    file.add("192.0.2.0/32", &Data::Text("x"));
    let mut at = 0;
    for n in 1..=5 {
        file.add(&format!("192.0.2.{n}/32"), &Data::List(vec![Data::Pointer(at); 16]));
        // Behind a text of two bytes, lists of two and five for each pointer.
        at = if at == 0 { 2 } else { at + 82 };
    }
    let error = select(&file.finish(24), r#"country.iso_code == "US""#).unwrap_err();
    let bounded = matches!(&error, MmdbError::Damaged(MaxMindDbError::ResourceLimit { .. }));
    assert!(bounded, "{error}");
}

proptest! {
    /// Every address belongs if the reader's own look-up says so.
    #[test]
    fn the_networks_are_those_of_the_records(
        nets in proptest::collection::vec((any::<[u8; 2]>(), 8_u8..=32, any::<bool>()), 1..12),
        probes in proptest::collection::vec(any::<[u8; 2]>(), 40),
    ) {
        let mut file = Writer::new(true);
        file.add("10.0.0.0/8", &place("GB", None));
        file.add("192.0.2.0/24", &place("US", None));
        for ([a, b], len, us) in &nets {
            let net = ipnet::IpNet::new(IpAddr::from([10, *a, *b, 0]), *len).unwrap().trunc();
            file.add(&net.to_string(), &place(if *us { "US" } else { "GB" }, None));
        }
        let bytes = file.finish(28);
        let found = select(&bytes, r#"country.iso_code == "US""#).unwrap();
        let reader = maxminddb::Reader::from_source(&bytes[..]).unwrap();
        for [a, b] in probes {
            let addr = IpAddr::from([10, a, b, 1]);
            let code: Option<&str> = reader
                .lookup(addr)
                .unwrap()
                .decode_path(&maxminddb::path!["country", "iso_code"])
                .unwrap();
            prop_assert_eq!(found.networks.find(addr).is_some(), code == Some("US"));
        }
    }

    /// A damaged file is refused, or read as whatever it says now; it never ends the agent.
    #[test]
    fn a_damaged_file_does_no_harm(
        described in any::<bool>(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let file = Writer::new(true);
        let mut bytes = cities_in(if described { file } else { file.undescribed() }, 24);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        _ = select(&bytes, r#"country.iso_code == "US""#);
    }
}
