//! An instant query of Prometheus as an answer (its HTTP API, `/api/v1/query`).

use serde::Deserialize;

use super::http::Client;
use crate::rollout::watch::Answer;

#[derive(Deserialize)]
struct Reply {
    status: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    data: Option<Data>,
}

#[derive(Deserialize)]
#[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
enum Data {
    Vector(Vec<Sample>),
    Scalar((f64, String)),
    Matrix(serde::de::IgnoredAny),
    String(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Sample {
    value: (f64, String),
}

/// Asks, and holds the value against a limit. Several values are as bad as the largest.
pub(super) async fn ask(client: &Client, url: &str, query: &str, above: f64) -> Answer {
    let form = format!("query={}", encoded(query));
    match client.form(&format!("{url}/api/v1/query"), form.into_bytes()).await {
        Ok((status, body)) => judge(status, &body, above),
        Err(failure) => Answer::None(failure.to_string()),
    }
}

fn judge(status: u16, body: &[u8], above: f64) -> Answer {
    let Ok(reply) = serde_json::from_slice::<Reply>(body) else {
        return Answer::None(format!("status {status}, and no answer of Prometheus"));
    };
    if reply.status != "success" {
        let why = reply.error.unwrap_or_else(|| format!("status {status}"));
        return Answer::None(format!("the query failed: {why}"));
    }
    let texts: Vec<String> = match reply.data {
        Some(Data::Vector(samples)) => samples.into_iter().map(|sample| sample.value.1).collect(),
        Some(Data::Scalar((_, value))) => vec![value],
        Some(Data::Matrix(_) | Data::String(_)) => {
            return Answer::None("the query gives no number for this moment".to_owned());
        }
        None => Vec::new(),
    };
    let mut worst: Option<f64> = None;
    for text in &texts {
        match text.parse::<f64>() {
            Ok(value) if !value.is_nan() => {
                worst = Some(worst.map_or(value, |worst| worst.max(value)));
            }
            // 0 ÷ 0: there was nothing to divide.
            _ => return Answer::None(format!("the value is {text}")),
        }
    }
    match worst {
        None => Answer::None("the query finds nothing".to_owned()),
        Some(value) if value > above => Answer::Bad(format!("{value}, above {above}")),
        Some(value) => Answer::Good(value.to_string()),
    }
}

/// As a form has it: everything but unreserved characters percent-encoded.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            true => out.push(char::from(byte)),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_told_from_what_is_none() {
        let vector = |values: &[&str]| {
            let samples =
                values.iter().map(|v| format!(r#"{{"metric":{{}},"value":[1.5,"{v}"]}}"#));
            let samples = samples.collect::<Vec<_>>().join(",");
            format!(
                r#"{{"status":"success","data":{{"resultType":"vector","result":[{samples}]}}}}"#
            )
        };
        for (body, word) in [
            (vector(&["0.5"]), "good"),
            (vector(&["1"]), "good"),
            (vector(&["1.01"]), "bad"),
            (vector(&["0.5", "2"]), "bad"),
            (vector(&["+Inf"]), "bad"),
            (vector(&["-Inf"]), "good"),
            (vector(&["NaN"]), "no answer"),
            (vector(&["5", "NaN"]), "no answer"),
            (vector(&[]), "no answer"),
            (
                r#"{"status":"success","data":{"resultType":"scalar","result":[1,"7"]}}"#.into(),
                "bad",
            ),
            (
                r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#.into(),
                "no answer",
            ),
            (
                r#"{"status":"error","errorType":"bad_data","error":"parse error"}"#.into(),
                "no answer",
            ),
            ("<html>502</html>".into(), "no answer"),
            (String::new(), "no answer"),
        ] {
            assert_eq!(judge(200, body.as_bytes(), 1.0).word(), word, "{body}");
        }
    }

    #[test]
    fn a_query_stays_what_it_was() {
        assert_eq!(
            encoded("rate(a{b=\"c\"}[5m]) + 1"),
            "rate%28a%7Bb%3D%22c%22%7D%5B5m%5D%29%20%2B%201"
        );
    }
}
