// The structs of the REST API and of the websocket, by the names they have in the OpenAPI document.
import type { components } from './schema';

type Schemas = components['schemas'];

export type Cluster = Schemas['Cluster'];
export type Endpoint = Schemas['Endpoint'];
export type Key = Schemas['Key'];
export type Run = Schemas['Run'];
export type RunDetail = Schemas['RunDetail'];
export type World = Schemas['World'];

export type ClientMessage = Schemas['ClientMessage'];
export type Polled = Schemas['Polled'];
export type ServerMessage = Schemas['ServerMessage'];
export type LatestValue = Schemas['LatestValue'];
export type Mark = Schemas['Mark'];
export type OutputRecord = Schemas['OutputRecord'];
export type ProgressBar = Schemas['ProgressBar'];
export type RankInfo = Schemas['RankInfo'];
export type RunInfo = Schemas['RunInfo'];
export type SeriesTail = Schemas['SeriesTail'];

/** What each topic of the websocket is made of. */
export interface Topics {
  clusters: Cluster;
  endpoints: Endpoint;
  keys: Key;
  runs: Run;
  worlds: World;
}
export type Topic = keyof Topics;

/** The columns of a metric: one entry per bucket of steps, over all ranks. A null mean is a gap. */
export interface Columns {
  step: number[];
  time: number[];
  epoch: (number | null)[];
  mean: (number | null)[];
  low: (number | null)[];
  high: (number | null)[];
  n: number[];
  not_finite: number[];
}

/** Columns between two steps; `is_exact` where each of them is one step. */
export interface Window extends Columns {
  is_exact: boolean;
}

export type ClusterKind = Schemas['ClusterKind'];
export type ClusterKinds = Schemas['ClusterKinds'];
export type ClusterOption = Schemas['ClusterOption'];
export type Device = Schemas['Device'];
export type NewKey = Schemas['NewKey'];
export type Replica = Schemas['Replica'];
export type ServedRevision = Schemas['ServedRevision'];
export type Worker = Schemas['Worker'];
export type WorldRank = Schemas['WorldRank'];
export type WorldVariables = Schemas['WorldVariables'];
