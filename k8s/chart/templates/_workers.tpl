{{- /* A worker group: (dict "root" $ "name" NAME "pool" POOL). */ -}}
{{- define "outcrop.workerGroup" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $servesHttp := has $pool.role (list "all" "ingress") -}}
{{- $drain := int $root.Values.drainSeconds -}}
{{- /* On SIGTERM, after preStop, Ray moves what it can off the node: for requests that other pods' proxies have sent here. */ -}}
{{- $rayDrain := 30 -}}
- groupName: {{ .name }}
  replicas: {{ $pool.replicas }}
  minReplicas: {{ $pool.minReplicas }}
  maxReplicas: {{ $pool.maxReplicas }}
  {{- if ne $pool.role "all" }}
  labels: {outcrop-role: {{ $pool.role }}}
  # Not in rayStartParams: KubeRay and Ray's autoscaler read quotes there in different ways, and where KubeRay can't, it
  # starts Ray without --num-gpus.
  resources: {outcrop_{{ $pool.role }}: {{ $pool.actors | quote }}}
  {{- end }}
  {{- if and $root.Values.autoscaler.enabled (ne $pool.priority nil) }}
  priority: {{ $pool.priority }}
  {{- end }}
  {{- if and $root.Values.autoscaler.enabled $pool.idleTimeoutSeconds }}
  idleTimeoutSeconds: {{ $pool.idleTimeoutSeconds }}
  {{- end }}
  rayStartParams:
    object-store-memory: {{ $pool.objectStoreMemory | int64 | quote }}
  template:
    metadata:
      labels:
        {{- include "outcrop.podLabels" (dict "root" $root "component" $pool.role) | nindent 8 }}
        {{- if $servesHttp }}
        outcrop-http: "true"
        {{- end }}
        {{- with $pool.labels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $pool.annotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "outcrop.podCommon" $root | nindent 6 }}
      automountServiceAccountToken: false
      {{- with $root.Values.serviceAccount.workers }}
      serviceAccountName: {{ . }}
      {{- end }}
      terminationGracePeriodSeconds: {{ add $drain $rayDrain 30 }}
      {{- with $pool.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $pool.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $pool.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints: # the loss of a node should not take all of a kind
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: {{ $pool.spread }}
          matchLabelKeys: [ray.io/cluster] # during an upgrade, each cluster by itself
          labelSelector:
            matchLabels:
              {{- include "outcrop.podLabels" (dict "root" $root "component" $pool.role) | nindent 14 }}
      {{- if $root.Values.models.volume.enabled }}
      {{- $by := $root.Values.models.fetch.by | default "" }}
      {{- if $by }}
      initContainers:
        - name: {{ eq $by "job" | ternary "wait-for-model" "fetch-model" }}
          {{- if eq $by "job" }}
          {{- include "outcrop.fetchContainer" (dict "root" $root "gpus" $pool.gpus "readOnly" true "command" (list "outcrop-fetch-model" "--wait" (printf "%s@%s" $root.Values.models.fetch.hubId $root.Values.models.fetch.revision) $root.Values.settings.model)) | nindent 10 }}
          {{- else }}
          {{- include "outcrop.fetchContainer" (dict "root" $root "gpus" $pool.gpus "readOnly" false "command" (include "outcrop.fetchCommand" $root | fromJsonArray)) | nindent 10 }}
          {{- end }}
      {{- end }}
      volumes:
        {{- include "outcrop.modelVolume" $root | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "outcrop.image" (dict "root" $root "gpus" $pool.gpus) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          ports:
            {{- if $servesHttp }}
            - {name: serve, containerPort: 8000}
            {{- end }}
            - {name: metrics, containerPort: 8080}
          env:
            {{- include "outcrop.env" $root | trim | nindent 12 }}
            - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $rayDrain | quote }}}
            # How long pods live on without the head, while it restarts or the cluster is deleted and drains.
            - {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: {{ max 600 (add $drain $rayDrain 30) | quote }}}
            {{- if $root.Values.models.volume.enabled }}
            - {name: HF_HUB_OFFLINE, value: "1"}
            {{- end }}
            {{- if include "outcrop.usesHub" $root }}
            {{- include "outcrop.hubToken" $root | nindent 12 }}
            {{- end }}
            {{- with $pool.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          securityContext:
            {{- include "outcrop.containerSecurity" $root | nindent 12 }}
          resources:
            {{- include "outcrop.resources" (merge (dict "gpus" $pool.gpus) $pool.resources) | nindent 12 }}
          {{- if $root.Values.models.volume.enabled }}
          volumeMounts:
            {{- include "outcrop.modelMounts" $root | trim | nindent 12 }}
          {{- end }}
          # Of our own: KubeRay's asks for an HTTP proxy, which says nothing of what is behind it, and which pods without
          # Serve replicas don't have.
          readinessProbe:
            exec:
              command: [outcrop-ready, {{ $servesHttp | ternary "http" "actor" }}]
            periodSeconds: 5
            timeoutSeconds: 8
            failureThreshold: 2
          lifecycle:
            preStop:
              exec:
                # As long as pods that serve HTTP drain, fronts and experts stay, if the whole cluster ends.
                command: [{{ $servesHttp | ternary "outcrop-drain" "outcrop-linger" }}, {{ $drain | quote }}]
{{- end -}}
